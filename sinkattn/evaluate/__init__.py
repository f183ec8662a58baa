"""The measurements of `sinkattn demo` and `sinkattn eval`: StreamingLLM's claims (arXiv 2309.17453), on any model."""
