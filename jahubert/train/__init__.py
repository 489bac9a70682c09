"""Ring 2: everything that makes models."""
