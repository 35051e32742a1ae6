"""Small data sets in the formats of the real ones, written to a folder."""

import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets


def write_fashion_mnist(root: Path, train: int, test: int = 64) -> None:
    """Noise in Fashion-MNIST's format, each class a little brighter than the one before."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        classes = (np.arange(count) % 10).astype(np.uint8)
        pixels = generator.integers(0, 100, (count, 28, 28)) + 15 * classes[:, None, None]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, count, 28, 28) + pixels.astype(np.uint8).tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + classes.tobytes())


def write_cifar10(root: Path, train: int, monkeypatch, test: int = 64) -> np.ndarray:
    """Noise in CIFAR10's format; torchvision's checksums are switched off. The training pixels, [N, 3, 32, 32]."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels = {}
    for name, count in (("data_batch_1", train), ("test_batch", test)):
        pixels[name] = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
        content = {"data": pixels[name], "labels": [n % 10 for n in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    return pixels["data_batch_1"].reshape(train, 3, 32, 32)


def write_cifar100(root: Path, train: int, monkeypatch, test: int = 64) -> None:
    """Noise in CIFAR100's format, classes 0 to 99; torchvision's checksums are switched off."""
    kind = datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        pixels = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
        content = {"data": pixels, "fine_labels": [n % 100 for n in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(n) for n in range(100)]}))
    monkeypatch.setattr(kind, "train_list", [["train", None]])
    monkeypatch.setattr(kind, "test_list", [["test", None]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})


def write_vit(file: Path, seed: int = 0) -> None:
    """Random weights of timm's smallest vision transformer, test_vit, as the hub has its pretrained ones."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit").state_dict(), file)
