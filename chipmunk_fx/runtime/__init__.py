"""One call at a time: which generation, step and branch it is, which variant serves it, with which caches."""
