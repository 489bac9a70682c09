"""Settings, records and processes of an experiment, on which every stage builds."""
