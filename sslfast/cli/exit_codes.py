"""Exit codes of the command ``sslfast``."""

EXIT_NOT_FINITE = 3
"""Exit code of a run whose loss became infinite or not a number."""


EXIT_INTERRUPTED = 75
"""Exit code of a run that saved a checkpoint on SIGTERM or SIGINT and can be resumed (EX_TEMPFAIL: try again)."""


EXIT_CODES = """\
exit codes:
  0    done
  1    unexpected failure, with a traceback
  2    wrong usage, configuration or data: one line with the remedy (SSLFAST_TRACEBACK=1 shows where)
  3    the loss became infinite or not a number
  75   stopped by SIGTERM or SIGINT with a checkpoint saved: the same command continues from there
  130  stopped at once by a second SIGINT (Ctrl-C)"""
