"""What compression costs on the tasks that the field uses: lm-evaluation-harness through the compressed cache."""
