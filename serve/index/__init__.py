"""Vectors to the index: buffer, writer and backends."""
