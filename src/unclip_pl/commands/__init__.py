"""Plain functions whose signature is their command line, one file each, and what ``reproduce`` plans and launches."""
