@echo off
rem Lint and the whole test suite, with the environment made first if it is not there: run_tests.bat [PYTEST ARGUMENTS]
rem Environment variable: PYTHON, the Python (3.10 to 3.13) that makes .venv. Exit code: that of what failed first.
rem Up to four tests at a time, one per core; -n 0 among the arguments: one after the other.
setlocal
cd /d "%~dp0" || exit /b 4
if not defined PYTHON set "PYTHON=python"
set "PYTHONUTF8=1"
rem on busy cores two threads of torch can be slower than one; no test may need a network; plots go to files
set "OMP_NUM_THREADS=1"
set "HF_HUB_OFFLINE=1"
set "MPLBACKEND=Agg"

%PYTHON% setup_environment.py --extras data eval filters web dev || goto failed
.venv\Scripts\python.exe -m ruff check . || goto failed
.venv\Scripts\python.exe -m ruff format --check . || goto failed
.venv\Scripts\python.exe -m pytest -n auto --maxprocesses 4 --dist loadfile %* || goto failed
exit /b 0

:failed
set "CODE=%ERRORLEVEL%"
echo run_tests.bat: the command above failed; nothing after it was run 1>&2
exit /b %CODE%
