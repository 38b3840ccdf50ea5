"""ASystem's runtime on one host: a single controller, SPMD workers, control apart from data.

Ring-1T section 2.5.  The controller calls methods of workers in other processes; weights travel
through shared memory.  Left out here: several hosts.
"""
