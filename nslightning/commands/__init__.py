"""The bodies of the measuring subcommands of ``nslightning``, one module each."""
