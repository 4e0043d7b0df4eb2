"""C++ and CUDA operators for brt. Nothing is imported from here: brt finds them by its hook."""
