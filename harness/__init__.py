"""What surrounds a run and is not the lesson: settings (= the command line), checks, report, results
and their identity, the states of long runs, and the boundary: how a command ends.
"""
