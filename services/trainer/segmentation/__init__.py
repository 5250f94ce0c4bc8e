"""The built-in segmenter's training: label maps of real anatomy, CT made from them, network, export (SynthSeg's idea).

No CT of a patient and no foreign weights go into it: Billot B et al. 2023, Med Image Anal 86:102789.
"""
