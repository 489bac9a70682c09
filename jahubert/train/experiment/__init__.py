"""Settings, records and processes of an experiment: what every stage builds on."""
