"""The Store: everything that must outlive a process, in SQL."""
