"""Examples of each command, for its help; without imports, so that `vdrop --help` is fast."""

EXAMPLES = {
    "train": """\
  vdrop train                                          the medium variational row on Penn Treebank
  vdrop train model=lstm_large dropout=variational     the large one, with its published settings
  vdrop train model=gru_small dropout=naive data=pydoc schedule.epochs=5
  vdrop train model=lstm_large debug=true              two steps of everything, in seconds; it counts nowhere
  vdrop train -m dropout=none,variational seed=1,2,3   a sweep: six runs, one after the other
  vdrop train data=text data.train=a.txt data.valid=b.txt data.test=c.txt
  vdrop train task=sentiment dropout=naive             ratings of film reviews
  vdrop train model=lstm_large stuck.steps=200         stops if the start is stuck; choose another seed then
  vdrop train schedule.epochs=60                       continues the same run of fewer epochs
  vdrop train checkpoint.minutes=inf checkpoint.epochs=5
                                                       few checkpoints, for a slow disk; a signal still saves
""",
    "eval": """\
  vdrop eval checkpoint=outputs/train/language_model-lstm_small-variational/0123abcd-s1
  vdrop eval checkpoint=… mc_samples=100               and MC dropout, by number of samples
  vdrop eval checkpoint=… data.dir=corpora/ptb         the corpus has moved
  vdrop eval checkpoint=… stored_data=true             read the data that the checkpoint itself names
  vdrop eval checkpoint=… file=other.txt               another text, without the corpus
""",
    "predict": """\
  vdrop predict checkpoint=… text="A film to remember ."
  vdrop predict checkpoint=… file=a.csv format=csv      the columns of the file, and the predictions
  vdrop predict checkpoint=… file=reviews.txt            a row per line of the file; or standard input
  vdrop predict checkpoint=… sample=50                   generate fifty words with a language model
  vdrop predict checkpoint=… sample=50 temperature=0.8 top_k=50   probable words only
""",
    "data": """\
  vdrop data                                           a look; nothing is fetched
  vdrop data data=ptb                                  fetch Penn Treebank if need be, and check it
  vdrop data data=text data.train=a.txt data.valid=b.txt data.test=c.txt
  vdrop data data=hub data.name=owner/name data.column=text
  vdrop data data=text_regression data.csv=a.csv data.column=text data.rating_column=stars
""",
    "export": """\
  vdrop export checkpoint=outputs/train/language_model-lstm_small-variational/0123abcd-s1
  vdrop export checkpoint=… file=model.safetensors
  vdrop export checkpoint=… folder=shared                with vocabulary, settings and a model card
  vdrop export checkpoint=… folder=shared push=me/model  and upload it to the Hugging Face Hub
(all of them need pip install 'vdrop[export]')
""",
    "compare": """\
  vdrop compare RUN RUN                                run folders; or any folder that holds some
  vdrop compare outputs/sweeps/20261128-120000         the runs of a sweep
  vdrop compare RUN RUN picture=curves.png title=Demo  and their learning curves
  vdrop compare RUN RUN csv=runs.csv markdown=runs.md
  vdrop compare tags=[ablation]                        all runs below outputs/train with this tag
(results are mean ± standard deviation over seeds)
""",
    "table": """\
  vdrop table                                          every size, with pictures
  vdrop table sizes=[small] file=small.md csv=small.csv latex=small.tex
  vdrop table record=true                              and keep what is small of the runs in outputs/record
""",
    "reproduce": """\
  vdrop reproduce sizes=[small] plan=true              what there is to do, and how long it takes here
  vdrop reproduce sizes=[medium] rows=[variational,variational_mc] seeds=3
  vdrop reproduce rows=[table1_medium_untied]          rows by the names of their experiments
  vdrop reproduce sizes=[large] seeds=3                the first three seeds whose start is not stuck
  vdrop reproduce jobs=3 until=25min mc_batch=500      three runs at once; the same command resumes them
  vdrop reproduce device=cpu backend=native precision=bf16 launcher=submitit_slurm    as jobs of a cluster
  vdrop reproduce study=film_reviews protocols=[clean] cells=[lstm] epochs=250 seeds=3
  vdrop reproduce study=baselines rows=[quick_tied]    a newer, small model
""",
    "bench": """\
  vdrop bench                                          every size, cell and precision: half an hour
  vdrop bench sizes=[medium] parts=[step]              whole training steps of the medium model
  vdrop bench 'cells=[variational,torch_lstm,keras]' precisions=[fp32]
""",
}
