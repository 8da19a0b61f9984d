# Fails when one of OBJECTS (separated by |) defines a weak symbol outside based::cpu::<ISA>.
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
execute_process(COMMAND ${NM} -C --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols
  COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "based::cpu::${ISA}::")
if(weak)
  list(JOIN weak "\n" weak)
  message(FATAL_ERROR "weak symbols outside based::cpu::${ISA}:\n${weak}")
endif()
