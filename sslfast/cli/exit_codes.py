"""Exit codes of the command ``sslfast``."""

EXIT_NOT_FINITE = 3
"""Exit code of a run whose loss became infinite or not a number, or whose features collapsed."""


EXIT_LOST = 4
"""Exit code of a command that waited in vain: for a batch (storage, a killed loader process) or for another process of
the run. Exceptions carry it as ``exit_code``."""


EXIT_INTERRUPTED = 75
"""Exit code of a run that saved a checkpoint on a signal and can be resumed (EX_TEMPFAIL: try again)."""


_WORDS = {
    0: "done",
    1: "unexpected failure, with a traceback",
    2: "wrong usage, configuration or data: one line with the remedy (SSLFAST_TRACEBACK=1 shows where)",
    EXIT_NOT_FINITE: "the loss became infinite or not a number, or with --on-collapse error all features became the "
    "same",
    EXIT_LOST: "no batch came (storage, a killed process), or another process of the run is gone; the run was saved "
    "if it had begun, and the same command continues",
    EXIT_INTERRUPTED: "stopped by a signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU) with a checkpoint "
    "saved: the same command continues from there",
    130: "stopped at once by a second SIGINT (Ctrl-C)",
}
EXIT_CODES = "exit codes:\n" + "\n".join(f"  {code:<4} {words}" for code, words in _WORDS.items())
"""For the help; one line for each code."""
