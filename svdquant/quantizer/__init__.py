"""A 16-bit linear becomes a 4-bit one: what a file may hold is fixed, how well it is filled is decided here.

task.py       what is to be quantized, and how far it has come
awq.py        modulations and text encoders: from weights alone, no branch
rounding.py   group scales, and values on the 4-bit grid
branch.py     the strongest low-rank part of a matrix
smoothing.py  search and learn the smoothing vector
moments.py    second moments of the inputs before and after rounding
gptq.py       round column by column, each repairing the error of those before
refit.py      the best branch and bias for codes that are already chosen
recipes.py    instant, fast, best and the paper's own, as lists of the steps above
statistics.py rows, means and extremes of every linear's inputs, gathered while a model runs
jobs.py       from a linear of a plan to a task
stream.py     a whole checkpoint, one layer in memory at a time
sensitivity.py  what every precision and rank of every linear costs and spoils
budget.py     the best choice among them within a size or an error, as pure numbers
choices.py    measuring and choosing for a file, and the table kept beside it
compare.py    how far pictures are apart
report.py     what it came to, in words
text_encoder.py  a 16-bit text encoder; published_t5.py writes T5-XXL as others do
"""
