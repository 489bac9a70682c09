"""Settings, provenance records and process group of an experiment, used by every stage."""
