"""Who writes rationales in place of a bundle's own generator."""
