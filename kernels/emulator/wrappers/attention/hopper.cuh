inline void publish_shared() { emulator::publish(); }
