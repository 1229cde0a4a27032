"""HTTP: translation between the wire and the flows, and nothing else."""
