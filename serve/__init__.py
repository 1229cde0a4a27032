"""Headrace as a plain library: everything here runs without Ray (see `deployments` for that)."""
