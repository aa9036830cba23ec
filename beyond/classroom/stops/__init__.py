"""The stops of the tour: each runs a part of the model, checks it, and describes what came out.

| module | what is in it |
|---|---|
| `tour.md` | the prose of the page, with places for what the run gives |
| `template.py` | filling in the places: texts, links to functions, and their source |
| `walk.py` | the sentence and the model that it is sent through; how numbers are written |
| `layer.py` | a layer, computed step by step |
| `next_token.py` | stops 1 to 6, from the text to the next token |
| `tasks.py` | stops 7 to 9, the classifiers and the optimizer |
| `pictures.py` | the pictures |
"""
