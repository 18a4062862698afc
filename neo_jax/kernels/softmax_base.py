"""The base of the softmax in the attention kernels: 2, because TPUs compute 2^x faster than e^x.

The factor log2(e) = 1 / LN_2 that turns one base into the other goes into the norm's scale of the
queries, where it costs nothing. Below, s = q k / sqrt(H) are the scores of the model's definition.

    model/attention.py      q' = q / (sqrt(H) LN_2)         the factor goes in, with 1 / sqrt(H)
    kernel's scores         s' = q' k = s / LN_2
    Pallas kernels          2^s' / sum 2^s' = softmax(s)    exp2 of the product as it is
    XLA implementations     softmax(LN_2 s') = softmax(s)   the factor comes out again
    gradients               dq' = LN_2 ds k, dk = LN_2 ds q'

So the model calls `interval_attention` and `decode_attention` with `scale=LN_2`: they compute
softmax(scale q' k). With any other scale, `flash.py` multiplies queries by scale * LOG2_E before
the Pallas kernels, which is 1 for LN_2.
"""

import numpy as np

LN_2 = float(np.log(2))
LOG2_E = float(np.log2(np.e))
