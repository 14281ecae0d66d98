"""Plain functions whose signature is their command line, one file each."""
