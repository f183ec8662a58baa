"""A server with OpenAI's API over a `sinkattn.StreamPool`; needs the extra ``serve``."""
