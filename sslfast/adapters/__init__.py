"""The faces of other projects' memory-bank modules, on the ops of sslfast. Needs torch and the compiled core alone."""
