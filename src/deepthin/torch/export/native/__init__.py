"""A model as a program of the C runtime (runtime/dt.h): from torch.export's graph to C, or to a flat file."""
