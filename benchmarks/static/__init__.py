"""What is known of the Triton kernels without a GPU: how they compile and what they move."""
