"""Text that a student, or its teacher, writes to be trained on."""
