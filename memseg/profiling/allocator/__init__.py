"""PyTorch's CUDA caching allocator, replayed: what would be reserved, of traces and of recordings."""
