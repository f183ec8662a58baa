"""The evaluation kit: the claims of StreamingLLM (arXiv 2309.17453), measured on a model of one's own."""
