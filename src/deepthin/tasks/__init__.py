"""The path under which documents of earlier versions name what is now ``deepthin.lab.tasks``."""
