"""The subcommands of `vblora-triton`, a module each.

A module has `add_to(commands)`, which declares its options and is quick, because --help runs it: what needs torch is
imported in `run(options)`, which does the work and returns the exit code. An InputError or an AdapterFileError that
`run` raises is printed in one line, and the exit code is 2.
"""
