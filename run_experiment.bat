@echo off
rem From a fresh clone to a spoken reply: six numbered commands, the same as in run_experiment.sh.
rem Each command skips or resumes what it has already done, so this script may be stopped and started at any time.
setlocal
set "CODE=0"
if "%~1"=="" goto start
if "%~1"=="--help" goto usage
if "%~1"=="-h" goto usage
if "%~1"=="/?" goto usage
if "%~1"=="full" goto full
echo error: unknown argument %1; run_experiment.bat --help explains 1>&2
exit /b 2

:usage
echo usage: run_experiment.bat [--help]
echo        run_experiment.bat full [--scale full or smoke] [--out DIR]
echo.
echo Runs the whole experiment on this machine, without a GPU if there is none:
echo   [1/6] setup_environment.py     makes .venv and installs the pinned packages
echo   [2/6] collect_data.py          speaks half an hour of two-speaker dialogues into data\
echo   [3/6] train_tokenizer.py       trains the audio tokenizer into runs\tokenizer\
echo   [4/6] train_minimal.py         trains a small speech model for 100 steps into runs\minimal\
echo   [5/6] evaluation_framework.py  measures both and writes runs\report\report.html
echo   [6/6] demo.py --mode test      speaks fixed conversations into runs\demo\
echo.
echo With "full": trains a voice that reads numbers, times, dates and prices, by recipes\nano_voice.py.
echo.
echo Run it again after a stop or a failure: what is done is skipped, what was begun is resumed.
echo Environment variable: PYTHON, the Python (3.10 to 3.13) that makes .venv, for example
echo   set "PYTHON=py -3.12"
echo Exit code: 0, or that of the step that stopped (each command's --help lists them); 2 for a wrong argument.
exit /b 0

:full
cd /d "%~dp0" || exit /b 4
if not defined PYTHON set "PYTHON=python"
set "PYTHONUTF8=1"
%PYTHON% recipes\nano_voice.py %2 %3 %4 %5
exit /b %ERRORLEVEL%

:start
cd /d "%~dp0" || exit /b 4
if not defined PYTHON set "PYTHON=python"
set "VENV_PYTHON=.venv\Scripts\python.exe"
set "PYTHONUTF8=1"
set "STARTED=%TIME%"

set "COMMAND=%PYTHON% setup_environment.py --extras data eval"
call :step 1 "Environment: make .venv and install the pinned packages (7 GB, some minutes the first time)" || goto stopped
set "COMMAND=%VENV_PYTHON% collect_data.py --sources synthetic --target_hours 0.5"
call :step 2 "Data: speak half an hour of two-speaker dialogues with an installed voice" || goto stopped
set "COMMAND=%VENV_PYTHON% train_tokenizer.py"
call :step 3 "Tokenizer: learn to turn 24 kHz audio into 12.5 frames of 32 codes per second, and back" || goto stopped
set "COMMAND=%VENV_PYTHON% train_minimal.py"
call :step 4 "Speech model: 100 training steps, to see the loss fall" || goto stopped
set "COMMAND=%VENV_PYTHON% evaluation_framework.py"
call :step 5 "Evaluation: measure the tokenizer and the speech model on held-out dialogues" || goto stopped
set "COMMAND=%VENV_PYTHON% demo.py --mode test --checkpoint runs/minimal"
call :step 6 "Demo: speak fixed conversations with the trained model" || goto stopped

echo.
echo Done. Started at %STARTED%, ended at %TIME%.
echo   spoken replies   %CD%\runs\demo\*\conversation.wav
echo   report           %CD%\runs\report\report.html
echo   TensorBoard log  %CD%\runs (to see it: .venv\Scripts\tensorboard --logdir runs)
exit /b 0

:stopped
exit /b %CODE%

:step
rem number and what it does; the command is in COMMAND
echo.
echo [%~1/6] %~2
echo       $ %COMMAND%
%COMMAND%
set "CODE=%ERRORLEVEL%"
if "%CODE%"=="0" exit /b 0
echo step %~1 of 6 stopped with exit code %CODE%: %COMMAND% 1>&2
echo what is done is kept; to go on: run_experiment.bat 1>&2
exit /b %CODE%
