"""What the mixin does around its steps, beside the step itself.

`hooks` (where Lightning calls it), `refusals` (what a Trainer may not be asked for), `schedulers` (learning rates under
manual optimization), `grad_scaler` (fp16), `resuming` (runs that go on within an epoch), `repeated_samples` (what
`DistributedSampler` adds), `lightning_internals` (private parts of Lightning).
"""
