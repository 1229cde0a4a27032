"""One story per file, top to bottom; the only place where sibling packages meet."""
