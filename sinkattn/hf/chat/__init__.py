"""A chat without end in a stream: the messages of a chat template, one by one."""
