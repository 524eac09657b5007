"""Speed against peers and floors, by one protocol: `moduli bench`.

    moduli.bench.protocol   how anything is timed
    moduli.bench.layer      one layer: our kernels, dense forms, transformers' backends
    moduli.bench.models     whole models: tuning and generation, dense against converted
    moduli.bench.targets    what the kernels are to reach

Floors and peers are measured in the same process; only ratios are compared.
"""
