"""Fast implementations of the parts of HuBERT, equivalent to the plain modules in `jahubert.model.hubert`."""
