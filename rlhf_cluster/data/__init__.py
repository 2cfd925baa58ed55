"""Files to records: prompts, demonstrations, comparisons.

    load_corpus   text rows of `data.source`, checked and split      (sources, split, readers, parse)
    encode_*      text rows and a tokenizer -> Prompts, Demonstrations, Comparisons
    PromptOrder   Prompts -> the Members of a step
    make_labeler  who ranks responses where no human rankings are given
    check         what a file is and what would be dropped

Knows nothing of Ray or torch; a tokenizer is an argument.
"""
