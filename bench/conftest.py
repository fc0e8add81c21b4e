"""As tests/conftest.py: the table trains bf16 with betas[1] = 0.999 on purpose."""


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::precond.PrecisionWarning")
