"""Operations: public functions with several implementations each."""
