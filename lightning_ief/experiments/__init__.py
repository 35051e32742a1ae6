"""What the command `lightning-ief` is made of: its subcommands, comparison, evaluation, tables and figures."""
