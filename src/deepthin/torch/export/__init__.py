"""Export of thin models to other runtimes, in small files that were run before they are kept."""
