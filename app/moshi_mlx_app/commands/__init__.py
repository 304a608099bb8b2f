"""One module for each command of the program.

A command's module has the name of the command and defines ``HELP`` (one line), ``EXAMPLES`` (for the end of its help),
``add_arguments(parser)`` and ``run(args)``, which returns the exit status. It imports heavy packages inside ``run``, so
that ``--help`` is fast. Its name goes into ``VERBS`` in :mod:`moshi_mlx_app.cli`.
"""
