"""The report of one run or several: a page that opens from disk, and its pictures.  `scripts/report.py` is the command.

records.py    what lies in a run's folder -> curves, results, predictions
samples.py    predictions -> the samples to show, with their pictures
attention.py  a checkpoint -> where its query tokens look
chart.py      curves, as SVG for the page and as PNG
page.py       all of it -> report.html, from page.html.jinja

Everything is read from files that training and `evaluate.py` left, so each number can be looked up; only the attention
asks the model itself.
"""
