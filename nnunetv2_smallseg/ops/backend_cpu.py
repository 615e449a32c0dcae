"""x"""
def unavailable(): return "not yet"
