"""sslfast: fast, exact self-supervised pretraining of image encoders, and the ops it is made of."""

__version__ = "0.1.0"
