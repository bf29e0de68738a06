"""`fused-preact bench`: the fused units against eager torch, in alternation, checked before they are timed.

cases.py says what is measured, contenders.py who takes part, plain.py what the baseline is, check.py whether the
answers are right, measure.py how time and bytes are taken, suite.py runs a list of cases, report.py and picture.py show
the result.
"""
