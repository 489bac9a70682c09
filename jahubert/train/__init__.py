"""Ring 2: everything that makes models, from a corpus to an error rate. Needs the extra `train`."""
