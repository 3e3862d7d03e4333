"""The rows of a comparison, for people: tables, figures and a page."""
